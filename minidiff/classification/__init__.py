"""The custom classifier and the study that asks whether synthetic images helped."""
