"""Every reader against files that went wrong: ``make fuzz``, and a small share of it in the tests."""
