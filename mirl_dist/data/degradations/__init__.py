"""Synthetic degradations: noise, blur, JPEG, low light, lost resolution, rain, haze and snow."""
