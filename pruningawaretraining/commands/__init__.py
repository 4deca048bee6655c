"""Commands of ``pat`` that look at runs; :mod:`pruningawaretraining.cli` registers them."""
