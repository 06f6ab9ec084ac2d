"""Layers for other people's models, called as torch.nn's are; none of ours uses them."""
