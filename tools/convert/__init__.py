"""Work behind ``tools/convert_meter_weights.py``."""
