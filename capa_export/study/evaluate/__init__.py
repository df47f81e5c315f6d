"""Dense and pruned models on the same questions: answers, the benchmarks' metrics, and how sure the differences are."""
