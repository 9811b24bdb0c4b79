"""Synthetic chest CT studies with reports, written in the published layouts of CT-RATE and CTRG.

The demo, the tests and smoke runs use them; every volume is a drawing, no patient was involved. Nothing here imports
torch.
"""

from __future__ import annotations
