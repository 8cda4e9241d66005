"""Models whose tokens differ in how much computation they take: looped, routed, nested."""
