"""What a trained model is used for: text scored and written, and a look at its rounds."""
