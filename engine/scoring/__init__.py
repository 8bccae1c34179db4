"""Scores of features and images. No other part of `engine` is imported.

- `features`: `Features`: embeddings with identities and cameras.
- `retrieval`: `score_retrieval`, `score_directions`, `RetrievalScores`: CMC, mAP and mINP.
- `reranking`: `score_reranked`: k-reciprocal re-ranking.
- `verification`: `score_verification`, `calibrate`: thresholds, ROC curve, equal error rate.
- `single_shot`: `score_single_shot`: one gallery image for each identity.
- `image_quality`: `QualityAccumulator`, `structural_similarity`: PSNR and SSIM.
- `intervals`: `Interval`, `retrieval_intervals`; `paired_differences` on the same queries.
- `matching`, `ranking`: steps of these scores.
"""
