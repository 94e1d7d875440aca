"""Processes, and the layers that split over them."""
