"""Long runs of what must never break: each module is a program that ends with status 1 when something did."""
