"""Present the findings to people: a terminal summary and one HTML file, in English and Japanese."""
