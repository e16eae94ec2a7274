"""The sharded parameter server: gradients in, versioned parameters out."""
