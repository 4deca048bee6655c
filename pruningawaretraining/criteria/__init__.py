"""Criteria: how important each group is. Each is a frozen dataclass with ``score(grouping, statistics)``."""
