"""PSNR and SSIM by named protocols."""
