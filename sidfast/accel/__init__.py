"""How networks run fast: fused UNet and decoder, attention, CUDA graphs, prepacked weights."""
