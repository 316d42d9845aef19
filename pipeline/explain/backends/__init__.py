"""One file a backend: who explains latents, and says by an explanation where one fires."""
