"""Fine-tuning: the thin shell that every benchmark under ``downstream/`` shares."""
