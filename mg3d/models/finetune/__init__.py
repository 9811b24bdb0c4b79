"""Models that fine-tune the image encoder, and what they share."""
