"""A blinded study with readers: a page to rate on (make), what the answers say (score), how many it
takes (plan)."""
