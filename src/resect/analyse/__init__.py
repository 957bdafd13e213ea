"""ANALYSE: answer questions about a trained model; weights and buffers are never changed."""
