"""The study on one page: did synthetic images help, told first, then every number that says so."""
