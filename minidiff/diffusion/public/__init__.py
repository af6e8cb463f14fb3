"""Public Stable Diffusion checkpoints in and out, exactly.

    weights ─▶ reader ─▶ ldm | folder (by keys) ─▶ load.load_sd ─▶ SDParts and its certificate
    a finished run ─▶ export ─▶ LDM file | diffusers folder;    latents: does the public VAE fit
                                                                these images?
"""
