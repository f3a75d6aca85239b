"""The places at which methods change a model: linear layers, embeddings, whole modules."""
