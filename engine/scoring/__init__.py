"""Scores of features and images: retrieval, re-ranking, verification, intervals, PSNR and SSIM."""
