"""An OpenAI-compatible embeddings service on Ray Serve: many models, one address."""
