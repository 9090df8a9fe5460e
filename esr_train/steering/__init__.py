"""Directions, interventions and the engines that generate under them."""
