"""The small decoder that ships with the project: latent space, dimensions, weights and photo."""
