"""Checks that training is exact, as plain functions of a loaded model and its data."""

import logging

# The processes of ``ranks`` import this first: what bitsandbytes then says of kernels that it could fetch, no user can act on.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
