"""The results page: tables, plots and sentences from the committed result files."""
