"""Scores restored images: PSNR and SSIM by named protocols."""
