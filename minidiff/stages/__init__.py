"""What the two stages of train.py are built of: here data, networks and training meet."""
