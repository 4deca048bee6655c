"""Masks, removal, penalties and the dry run: what is done to a model's weights."""
