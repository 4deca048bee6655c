"""Masks, removal, penalties and the dry run of removals."""
