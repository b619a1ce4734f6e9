"""The functional core: (state, usage, budgets, book, now) -> (state, effects). No I/O, no clock."""
