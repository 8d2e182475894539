# Importing this module registers the compiled kernels with torch.ops.maml_ext. It has no members.
