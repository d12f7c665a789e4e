"""Measuring: the figures that the appliance promises, taken on this box from outside, as a client sees them."""
