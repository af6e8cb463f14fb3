"""Public Stable Diffusion checkpoints in and out, exactly.

    weights ─▶ reader ─▶ ldm | folder (by keys) ─▶ load.load_sd ─▶ SDParts and its certificate
    a finished run ─▶ export ─▶ LDM file | diffusers folder
    fetch: public files by name;    __main__: the commands, `latents` among them
"""
