"""What a pre-trained model knows: linear probe, retrieval, zero-shot, effective rank."""
