"""The side that a user's loop talks to: Pruning, Pruner, one_shot; optimizer hooks, state, reports, teacher."""
