"""The model and its mathematics: schedule, denoiser, samplers, networks, conditioning."""
