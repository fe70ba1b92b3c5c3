"""A plan's result that is not written: a model between two steps that only the next one reads.

`leaving.Leaving` takes the place of `surgeon.execute.execute`: it computes all weights once, in the order of the files,
for the digests of the manifest, and puts everything beside the weights into the folder, byte for byte as it would be
beside them. `view.Unwritten` is a Checkpoint that computes each block again when somebody reads it.
"""
