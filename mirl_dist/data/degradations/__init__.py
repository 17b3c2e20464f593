"""Noise, blur, rain, haze, snow and lost resolution, made on images."""
