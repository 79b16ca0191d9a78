"""The report's networks and training in plain PyTorch: the row every ran_ext figure is compared with.

Nothing here imports ran_ext (a test holds it to that).
"""
