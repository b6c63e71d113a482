"""Plans a run, and runs its sweeps over the model one part at a time: embeddings, blocks, output head."""
