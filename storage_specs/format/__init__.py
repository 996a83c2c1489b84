"""What a store is: its spec and manifest, the two layouts, the dtypes of z, the noise law, pixels, and the cards."""
