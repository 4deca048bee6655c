"""``python -m pruningawaretraining`` is ``pat``."""

from pruningawaretraining.cli.main import main

if __name__ == "__main__":
    main()
