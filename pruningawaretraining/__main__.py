"""``python -m pruningawaretraining`` is ``pat``."""

from pruningawaretraining.cli import main

if __name__ == "__main__":
    main()
