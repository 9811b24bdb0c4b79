"""Metrics as pure functions of arrays; each states what it does with empty classes and ties."""
