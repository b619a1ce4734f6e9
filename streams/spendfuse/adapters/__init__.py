"""Other people's dialects: their files and events to ours, and our halt to theirs; one module each."""
