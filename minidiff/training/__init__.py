"""What every training loop needs, knowing nothing of models: precision, EMA, state."""
