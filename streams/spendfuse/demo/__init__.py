"""The demo: a weekend like the one that cost $47,000, and a replay of real traces, on the real path."""
