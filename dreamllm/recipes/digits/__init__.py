"""Recipe `digits`: a complete DreamLLM on scikit-learn's scanned digits, from components to instructions."""
